"""A model server to test against."""
