"""First and last names of many cultures, for made-up people."""

_FIRST = """
Aaliyah Abdul Abena Adaeze Adele Adrián Agnieszka Ahmed Aiko Aisha Akosua Alejandro Alessia Alice
Alina Amara Amina Amit Anahera Ananya Andrzej Anneliese Anouk Arash Ariel Arjun Astrid Ayesha
Aylin Baraka Beatriz Bence Bilal Birgit Björn Bogdan Boris Brigitte Bruno Camille Carlos Catarina
Chiara Chidi Chloe Claudia Connor Dalia Daniela Darius Deepika Dimitri Dragan Dylan Edith Eero
Ekaterina Elena Elif Elijah Emeka Emre Enrique Erik Esra Esther Fadi Farah Fatima Feng Fernanda
Fiona Florian Francesca Freya Gabriel Gergely Giovanni Grace Greta Guillermo Gustav Hana Hans
Haruto Hassan Heidi Helga Hiroshi Hugo Ibrahim Ignacio Ileana Imani Ines Ingrid Irina Isabel Ivan
Jamal Jana Javier Jelena Jin Joanna Johan Jorge Juan Julia Kaito Kamala Karim Katarzyna Keiko
Khadija Kofi Kwame Lakshmi Lars Laszlo Latisha Leila Leonie Liam Lina Ling Lucia Luka Magnus
Mahmoud Maja Malik Manuela Marek Mariam Mateo Matilda Mehmet Mei Miguel Mikhail Milena Minh Miriam
Mustafa Nadia Naledi Naoko Nasser Natalia Niamh Nikolai Nils Noor Nour Odile Olga Omar Oscar Otto
Pablo Padma Paolo Patience Pavel Pedro Petra Priya Rafael Rahul Rania Ravi Renata Rohan Rosa
Rukmini Ryo Sabine Sadio Sakura Samira Sanjay Santiago Saoirse Sergei Shreya Sigrid Siobhan Sofia
Soren Stanislav Sunita Svetlana Tadeusz Takumi Tamar Tariq Tatiana Thabo Thandiwe Tomasz Ulrike
Umberto Valentina Vasile Veronika Vikram Viktor Wanjiru Wei Xavier Ximena Yara Yasmin Yuki Yusuf
Zainab Zanele Zofia
"""
_LAST = """
Abebe Abrahamsson Acheampong Addo Adeyemi Agarwal Aguilar Ahlberg Albrecht Almeida Álvarez
Andersen Andrade Antonescu Aoki Appiah Araujo Arslan Asante Aydin Baker Banerjee Bauer Becker
Bergström Bernard Bianchi Blanchard Blom Boateng Bondarenko Borges Brandt Caruso Castillo Çelik
Chaudhary Chen Choi Christensen Cohen Colombo Correia Costa Cruz Dahl Danjuma Das Demir Desai
Diallo Dias Dietrich Dimitrov Dlamini Dubois Dvořák Eklund Engel Eriksen Esposito Fabre Farkas
Farouk Fernandes Ferrari Fischer Fontaine Friedman Fujita Gallagher García Georgiou Ghosh Gomes
González Goto Grabowski Greco Gupta Gustafsson Haddad Hakimi Hansen Hashimoto Heikkinen Hernández
Hoang Hoffmann Horvat Hosseini Huang Hussein Ionescu Ishikawa Ito Ivanov Jansen Janssens Jensen
Jiménez Johansson Jovanović Kamau Kaplan Karlsson Kaya Keita Khalil Khumalo Kim Kimani Kiss
Kobayashi Koch Kovács Kowalski Krause Kumar Kuznetsov Lambert Larsen Lefebvre Lehtinen Lima
Lindqvist Lombardi Lopes Mahlangu Mancini Marino Markovic Martínez Mbeki Mehta Meier Mendes Mensah
Meyer Mitsui Mohammadi Molina Moreau Moretti Morozov Mutua Mwangi Nagy Nakamura Nasser Ndiaye
Németh Nguyen Nielsen Nkosi Novák Nowak Nyström Obi Ochieng Oduya Okafor Okonkwo Olsen Omondi
Oliveira Ortega Owusu Öztürk Papadakis Park Patel Pavlov Pereira Petrenko Petrov Pham Popescu
Quispe Rahman Ramírez Rao Reyes Ricci Rinaldi Romano Rossi Roux Ruiz Saito Salazar Sato Schneider
Sharma Silva Singh Sørensen Suzuki Szabó Takahashi Tanaka Tembo Torres Tran Tshabalala Vasquez
Verma Virtanen Vogel Wagner Wang Watanabe Weber Wiśniewski Yamamoto Yang Yildiz Zhang Zimmermann
Zulu
"""
FIRST_NAMES, LAST_NAMES = tuple(_FIRST.split()), tuple(_LAST.split())
