"""Who may look: on this machine everybody, from elsewhere who knows the token."""

import hmac
import os

import streamlit as st

VARIABLE = "REASONSCOPE_APP_TOKEN"
_GRANTED = "reasonscope access"


def granted() -> bool:
    """Whether the page may be shown; asks for the token where one is needed and was not given.

    A token in the address is taken once and then removed from it, so that a copied link does not hand it on.
    """
    wanted = os.environ.get(VARIABLE, "")
    if not wanted or st.session_state.get(_GRANTED):
        return True
    given = st.query_params.get("token") or st.text_input("Access token", type="password")
    st.query_params.pop("token", None)
    if given and hmac.compare_digest(given.encode(), wanted.encode()):
        st.session_state[_GRANTED] = True
        st.rerun()
    if given:
        st.error("That is not the token that the app was started with.")
    return False
