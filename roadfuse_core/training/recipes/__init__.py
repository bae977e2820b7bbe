"""The papers' recipes; a recipe names one as its `base`."""
