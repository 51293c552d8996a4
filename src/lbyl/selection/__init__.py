"""Selection: ranks channels by a criterion, and chooses those to keep."""
