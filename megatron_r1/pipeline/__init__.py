"""The stages of a recipe, in order: what is done, what runs next, in every rank of the world."""
