"""Things you submit to Ray."""
