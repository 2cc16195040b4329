"""Real engines behind an edge: what the edge recorded, and what the engine itself counted."""
