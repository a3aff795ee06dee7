"""Contact sheets and animations."""
