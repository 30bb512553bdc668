# The package of llama.cpp's sources lacks this template, without which ggml is not configured alone.
file(TOUCH "${CMAKE_CURRENT_SOURCE_DIR}/ggml.pc.in")
