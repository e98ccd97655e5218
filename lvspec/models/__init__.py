"""What the loop needs of a model: passes, caches, attention, and how checkpoints are loaded."""
