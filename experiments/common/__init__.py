"""What experiments share: data, and progress with a log."""
