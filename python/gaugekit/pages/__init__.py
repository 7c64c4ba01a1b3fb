"""Pages of results: one self-contained HTML document each, with charts drawn from data."""
