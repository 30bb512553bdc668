"""What the survey says of toolchains, put to the packages as they were published."""
