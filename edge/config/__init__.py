"""routes.toml: what may stand in it, read with every problem at once."""
