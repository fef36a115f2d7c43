"""The program: commands that start, show and administer a cloud."""
