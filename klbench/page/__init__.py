"""The page that a board writes: `index.html.j2`, `style.css` and the figures on it."""
