"""What demonstrations and token data sets are, on disk and in memory; knows neither simulator nor model."""
