"""The pages that a board writes: `site.py` makes the files, `views.py` what they say, `figures.py` and the scripts draw."""
