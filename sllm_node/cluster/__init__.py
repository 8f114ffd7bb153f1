"""Other nodes: who they are, who is alive, what they tell of themselves."""
