#pragma once

// BINCONV_API marks what the library exports. The build defines BINCONV_STATIC for consumers of the
// static library and BINCONV_BUILDING while the shared library itself is compiled.
#if defined(BINCONV_STATIC)
#define BINCONV_API
#elif defined(_WIN32)
#if defined(BINCONV_BUILDING)
#define BINCONV_API __declspec(dllexport)
#else
#define BINCONV_API __declspec(dllimport)
#endif
#else
#define BINCONV_API __attribute__((visibility("default")))
#endif
