"""How wide each group may stay."""
