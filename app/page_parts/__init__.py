"""Parts that the app's pages share: state, components, the trace reader and its colourings."""
