"""What the commands share: parsing of command lines, and starting of training on several devices."""
