"""What events mean: their phase, the mismatches, and when those end.  Pure: no I/O, no clock."""
