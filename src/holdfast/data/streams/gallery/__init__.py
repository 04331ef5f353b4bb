"""gallery: generated pictures, and questions about them whose answers belong to rooms."""
