"""The shapes corpus: captioned pictures of coloured shapes drawn from known scenes, and their exact scorer."""
