"""Run, copy, watch and time somebody's model without leaving a trace."""
