/* seal.h: one connection's bytes as AEAD records: AES-256-GCM or ChaCha20-Poly1305, of OpenSSL.
 *
 *     0  u24 length of what is sealed, 1..SEAL_PLAIN_MAX, little-endian   | these four bytes are sealed as
 *     3  u8  type: 1 bytes of the stream, 2 the sender goes on in an epoch | associated data, with what follows
 *     4  ... ciphertext, then 16 bytes of tag
 *
 * Associated data: the four bytes, u8 1 from who dialed, u64 epoch number, u64 records before under this key. The nonce is
 * that count. So a record that was altered, left out, repeated, sent elsewhere or back does not open, and nothing behind it
 * does: the connection is to be closed (EBADMSG).
 * Each direction has a secret: its key follows from it, and the next secret from it, the epoch that is gone on in, and what
 * two X25519 keys give of which one is made for that (ratchet.h). So a stolen key or secret opens nothing of any other epoch.
 * Reads and writes the socket, never blocks, holds what half a record needs. Threads: one.      Spec: proto/wire.md 10 */
#ifndef PYCCL_SEAL_H
#define PYCCL_SEAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "../include/pyccl.h"
#include "ratchet.h"

#define SEAL_HEAD_BYTES 4u
#define SEAL_TAG_BYTES 16u
#define SEAL_RECORD_MAX 65536u
#define SEAL_PLAIN_MAX (SEAL_RECORD_MAX - SEAL_HEAD_BYTES - SEAL_TAG_BYTES)
#define SEAL_RECORDS_MAX (UINT64_C(1) << 24) /* under one key */

typedef struct seal seal;

seal *seal_new(const pyccl_conn_keys *keys, ratchet_source source); /* NULL: no memory, or no such cipher in OpenSSL */
void seal_free(seal *s);                                         /* NULL: nothing */
void seal_enter(seal *s, uint64_t number, const uint8_t id[16]); /* what is sent from now on is of this epoch */
/* As sendmsg and recvmsg on a socket that does not block: bytes of the stream, or -1 and errno; recv 0: its end. What send
 * took is ours, and may wait in `s`, or it has something of its own to tell (also after recv): seal_is_unsent. */
ssize_t seal_send(seal *s, int fd, const struct iovec *iov, int count);
ssize_t seal_recv(seal *s, int fd, const struct iovec *iov, int count);
bool seal_is_unsent(const seal *s);
bool seal_has_more(const seal *s); /* seal_recv has something to open or to return without the socket */

#endif
