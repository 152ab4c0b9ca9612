"""Results for people: tables, pages and charts, two reports side by side, and reports over time."""
