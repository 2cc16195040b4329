"""Where usage records are delivered."""
