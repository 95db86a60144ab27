# This scenario has no on-demand functions.
