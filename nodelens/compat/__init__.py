"""The call signatures of the systems that nodelens replaces: thin functions over the other packages."""
