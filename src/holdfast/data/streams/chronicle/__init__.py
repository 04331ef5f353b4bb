"""chronicle: a generated world whose facts belong to years."""
