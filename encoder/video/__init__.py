"""Films and cameras: faces followed, smoothed, drawn, put back. Formats are `encoder.films`."""
