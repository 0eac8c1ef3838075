"""What a run leaves behind, and how a command ends. Imports nothing of ours and no torch, so reports start at once."""
