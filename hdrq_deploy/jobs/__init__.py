"""Work in parts, on processes of this machine or on a Ray cluster."""
