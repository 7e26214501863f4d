"""Episodes of a run: texts of their turns, the replies of the environment, and what is kept."""
