"""FLOPs, utilisation and arithmetic intensity of TinyOpenFold, on one device or several."""
