"""What `klbench new` writes: a task folder and an objective's file, as jinja templates."""
