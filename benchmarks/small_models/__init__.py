"""How the small models that the package ships are trained."""
