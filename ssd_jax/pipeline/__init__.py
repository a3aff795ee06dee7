"""What a user holds: a loaded model that generates images."""
