"""What rehearsal needs beside its losses: samples, and what the teacher said about them, computed once."""
