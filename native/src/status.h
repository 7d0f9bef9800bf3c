/* status.h: PYCCL_ASSERT, for bugs of our own. What the world does wrong is a pyccl_status, never an assertion. */
#ifndef PYCCL_STATUS_H
#define PYCCL_STATUS_H

/* Prints "file:line: assertion failed: text" to stderr and aborts. */
_Noreturn void pyccl_assert_failed(const char *file, int line, const char *text);

/* On in release builds too: the condition is always evaluated, keep it cheap. */
#define PYCCL_ASSERT(cond) ((cond) ? (void)0 : pyccl_assert_failed(__FILE__, __LINE__, #cond))

#endif
