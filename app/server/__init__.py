"""The Streamlit server: its entry script, access control and start-up."""
