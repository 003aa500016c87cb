"""Takes edits from the bus, and puts jobs back that stopped moving."""
