#pragma once

// Symbols with FLASH_MLA_API are what the shared library exports; everything else is hidden.
#if defined(__GNUC__)
#define FLASH_MLA_API __attribute__((visibility("default")))
#else
#define FLASH_MLA_API
#endif
