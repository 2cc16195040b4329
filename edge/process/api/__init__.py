"""Keys and users over HTTP, on the admin listener."""
