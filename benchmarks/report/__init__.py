"""What is said of the results: tables, targets, pictures, pages. Needs no torch; the pictures need matplotlib."""
