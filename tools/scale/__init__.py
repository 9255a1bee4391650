"""How many machines so many users need: the arithmetic (`plan`) and a simulation of a divided store (`shards`)."""
