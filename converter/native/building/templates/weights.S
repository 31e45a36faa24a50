/* The data files, as they are. @DIGEST@ */
    .section .rodata
    .balign 64
    .globl gkp_data
    .hidden gkp_data
gkp_data:
    .incbin "weights.bin"
    .globl gkp_json
    .hidden gkp_json
gkp_json:
    .incbin "describe.json"
    .byte 0
    .section .note.GNU-stack,"",%progbits
