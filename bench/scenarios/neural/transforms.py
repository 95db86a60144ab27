# There are none.
