"""The oracles of the tests: each operator as its equation reads, in plain torch or numpy."""
