"""TinyOpenFold: trained and profiled on one device or several, planned or not."""
