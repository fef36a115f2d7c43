"""Images: Image API v2, inspected and stored once by content."""
