"""Model cards: templates, and the facts that they are filled with."""
